"""Fair comparisons: arms that differ in one thing, trained on the same batches, judged by the same features."""
