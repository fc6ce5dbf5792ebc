"""An L2D checkpoint behind transformers' own serving application; `python -m l2d serve` starts it."""
