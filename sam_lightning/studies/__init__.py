"""Many runs: sweeps, studies, their cost, the report."""
