"""Is anything lost, or wrong without a word? Writers killed, files damaged, disks filled, hostile input, endurance."""
