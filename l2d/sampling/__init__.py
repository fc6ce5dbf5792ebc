"""Integration of the diffusion ODE: noise, grids, adaptive solvers and exact speculation."""
