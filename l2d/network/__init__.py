"""The network: the frozen base (main path), the diffusion path beside it, and the parts that both are made of."""
