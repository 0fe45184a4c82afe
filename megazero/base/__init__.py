"""Words that everyone needs."""

from megazero.base.disk import draft_of, not_followed, opened, sync, unwritable, whole, write_json
from megazero.base.dtypes import DTYPES
from megazero.base.errors import UserError, naming
from megazero.base.lease import Lease
from megazero.base.memory import give_back
from megazero.base.strict import LONGEST, Form, checked, faults, inside, load, loads, made, printable, read_bytes, said
from megazero.base.text import Bar, clock, gib, say
