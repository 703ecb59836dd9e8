"""What `python -m experiments new NAME --kind KIND` copies: the folder of the kind, and common/."""
