"""What a step costs: FLOPs, memory, collectives, and what hardware can do."""
