"""What an image costs, by the batch, width, depth, image size and number of threads."""
