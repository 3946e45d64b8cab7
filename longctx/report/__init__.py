"""One page of HTML about runs: curves, differences of configs, router health, warnings.

The page needs nothing but itself: no network, no other file, and no JavaScript to be read.
"""

from longctx.report.page import ReportConfig, write_report

__all__ = ["ReportConfig", "write_report"]
