"""report.html: one self-contained page that says what a run did, made from its folder alone."""

from dinox_train.report.page import write_report as write_report
from dinox_train.report.verdict import verdict_in_words as verdict_in_words
