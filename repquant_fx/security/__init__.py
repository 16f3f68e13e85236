"""What keeps a file from doing harm: names, escapes, a guard on what a model does while it runs, a supervised
process.
"""
