"""From what a user types to a command of the wire: exact syntax by rule, sentences by a small local model.

What clients import: `Parser`, `Reading`, `Context`, `parse_exact` and the table of `/commands`. Layer c:
imports `messages`, the errors and the backends of the mind only.
"""

from uvm.parser.context import Context
from uvm.parser.exact import SLASHES, parse_exact
from uvm.parser.parser import Parser, Reading

__all__ = ["SLASHES", "Context", "Parser", "Reading", "parse_exact"]
