"""The report of a run: ``report.html`` and the comparison table.

``tables`` formats the comparison (for the terminal too), ``theme`` and ``plots`` draw the
figures, ``html`` puts everything into one self-contained page.
"""

from blip_ft.report.html import write_data_report, write_report
from blip_ft.report.tables import demo_table

__all__ = ["demo_table", "write_data_report", "write_report"]
