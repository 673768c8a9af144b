"""From counts to results, reports and plots."""
