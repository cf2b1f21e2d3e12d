"""``python -m sing_plugins`` is the command ``sing-plugins``."""

from sing_plugins.cli import main

raise SystemExit(main())
