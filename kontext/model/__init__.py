"""The networks as readable equations: no devices, no files, no options."""
