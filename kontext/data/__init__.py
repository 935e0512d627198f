"""From a dataset file to batches: pictures, buckets, caches."""
