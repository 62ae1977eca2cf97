"""The load client: sends a trace to any OpenAI-compatible endpoint and measures what comes back.

How times are counted
- Open loop: a request is sent when the trace says, however many are unanswered. Its arrival is the
  planned one, so lateness of the client counts against the result (and is reported).
- A token comes when the streamed event that holds it is read. An event of k tokens counts one gap
  and k - 1 gaps of zero: bursts are shown as they are.
- How many tokens an event holds is taken from the usage the server sends with every chunk
  (`continuous_usage_stats`); where it sends only a final usage, the total is spread evenly over the
  events that carry text.
- TTFT and TBT are over requests that did not fail; failed ones are counted beside them, and as 0 in
  every share.
"""
