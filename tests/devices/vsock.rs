//! The socket device beyond single packets: who waits for whom, what it costs, and how connections end.
