"""Low-rank adapters: training them, reading every published file format, merging them into a model."""
