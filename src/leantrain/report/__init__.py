"""What a person looks at after a comparison: one HTML page that needs nothing else."""

from leantrain.report.page import write_report

__all__ = ["write_report"]
