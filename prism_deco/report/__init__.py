"""Reports: tables that stand beside references."""
