"""Reports that people look at: HTML pages that open offline, made from saved reports."""

from jaxrmils.evaluation.page.compare_page import compare_page as compare_page
from jaxrmils.evaluation.page.comparing import Comparison as Comparison
from jaxrmils.evaluation.page.comparing import NamedReport as NamedReport
from jaxrmils.evaluation.page.comparing import compare as compare
from jaxrmils.evaluation.page.report_page import report_page as report_page
from jaxrmils.evaluation.page.saved import SavedReport as SavedReport
from jaxrmils.evaluation.page.saved import SavedRun as SavedRun
from jaxrmils.evaluation.page.saved import read_report as read_report
from jaxrmils.evaluation.page.saved import read_run as read_run
