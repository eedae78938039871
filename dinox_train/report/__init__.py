"""report.html: one self-contained page that says what a run did, made from its folder alone."""

from dinox_train.report.page import Report as Report
from dinox_train.report.page import write_report as write_report
