"""What keeps a file that nobody vouches for from doing more than being read."""
