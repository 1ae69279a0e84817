"""What the matrix functions share, and no user calls.

`function` is the rule for a matrix function; `escalation` runs its methods; `loading` checks and scales its input;
`cost` predicts seconds. The rest is arithmetic: `rounding`, `scaling`, `double_double`, `probes`, `lapack`,
`symmetric_products`, `eigenvalue_ratio`, `similarity`, and the Krylov iterations.
"""
