"""What the system costs, beside what one would use instead; see README.md."""
