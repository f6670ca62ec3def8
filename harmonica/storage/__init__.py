"""Storage: whole files or none, our formats and other people's, sharing them."""
