"""How the requests of lm-eval are answered."""
