"""A run on several processes: starting and connecting them, sharding the model, detecting failures."""
