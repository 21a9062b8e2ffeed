"""The commands: one file a stage, each loads its stage when it runs."""
