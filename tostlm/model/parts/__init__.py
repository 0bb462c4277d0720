"""What several mixers are made of: short convolutions, forgetting, running sums of vectors and of matrices."""
