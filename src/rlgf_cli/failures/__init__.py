"""What texts do wrong: failures made on purpose, rules that find them, and rules that mend them."""
