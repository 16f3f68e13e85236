"""What keeps a file from doing harm: names, a guard on what a model does while it runs, a supervised process."""
