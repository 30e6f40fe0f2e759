"""Training on though some workers lie: rules that combine vectors, and MoNNA, which is built on them."""
