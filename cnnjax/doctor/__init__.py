"""What this installation is, what is wrong with it, and how to mend each fault.

`facts` reads the system and the installed packages without importing any of them; `probe` starts
JAX and trains for a second in a process of its own, which may crash or hang; `conflicts` are rules
from these facts to findings; `report` sets them as text. None of them needs a JAX that works.
"""
