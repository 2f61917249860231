"""What is wrong with an index's images: copies, leaks, wrong labels, foreign ones, ones that the model is unsure of."""
