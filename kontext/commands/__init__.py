"""One module per command: `run(options)` reads as the pipeline it performs."""
