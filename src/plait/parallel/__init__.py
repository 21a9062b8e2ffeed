"""Pure arithmetic of a tensor x pipeline grid."""
