"""What can be known of a run before it starts: its launch, ranks, memory and inputs, and one tiny step."""
