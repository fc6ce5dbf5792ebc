"""Parity with the released implementation: `python -m tests.parity DIR`.

- `fixtures`: reads a folder of cases; `runner`: makes the checks; `report`: tolerances and what is printed
- `representations`, `forwards`, `solves`, `decoding`, `losses`: the checks
"""
