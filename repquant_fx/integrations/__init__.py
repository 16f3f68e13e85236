"""The compiler inside other tools. Each file here needs the package that it is named after; nothing else imports it."""
