"""Training on Megatron Core: its model, optimizer and schedules; process groups are started here."""
