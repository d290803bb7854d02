"""Images and datasets: from names, folders and zips to batches."""
