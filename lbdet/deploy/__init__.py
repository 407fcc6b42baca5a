"""What leaves the laboratory: a trained low-bit model as a small file, and as one that engines run."""
