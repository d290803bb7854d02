"""What models cost: images per second, latency, memory, and device-days of pre-training."""
