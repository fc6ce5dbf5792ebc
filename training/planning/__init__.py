"""What a run would do and need, before it is made.

- `dry_run`: parameters, memory, schedule and what is trained, without weights
- `estimates`: memory and operations, from shapes alone
"""
