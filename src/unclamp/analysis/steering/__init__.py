"""Steering: when a site's scaling changes, decided from amaxes, in a training and over logs."""

from unclamp.analysis.steering.backtest import Backtest, RunTested, backtest
from unclamp.analysis.steering.decisions import Decision
from unclamp.analysis.steering.machine import Machine
from unclamp.analysis.steering.rule import Rule, parse_rule

__all__ = ["Backtest", "Decision", "Machine", "Rule", "RunTested", "backtest", "parse_rule"]
