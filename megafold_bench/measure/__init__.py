"""What is measured in a worker: step times, memory. The device sampler runs beside either."""
