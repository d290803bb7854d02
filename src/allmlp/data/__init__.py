"""Images and datasets: from names, folders, archives and shards to batches."""
