"""Reports: one HTML file about finished runs, which needs nothing beside itself.

``reading`` finds what belongs together, ``findings`` says in words what was found, ``tables`` and ``drawing`` show the
numbers, and ``page`` puts all of it into the template.
"""

from fqtstats.report.html.page import is_report, render
from fqtstats.report.html.reading import Run, read

__all__ = ["Run", "is_report", "read", "render"]
