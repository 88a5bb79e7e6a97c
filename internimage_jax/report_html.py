def make_page(report, results, read):
    return "<!doctype html>"
