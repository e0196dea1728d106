//! As much of gRPC's framing and of protocol buffers as counting needs.

/// Puts gRPC's messages together from what arrives in pieces of any size.
///
/// Before each message stand five bytes: whether it is compressed, and its length, big endian.
#[derive(Debug, Default)]
pub(super) struct Messages(Vec<u8>);

impl Messages {
    /// The messages that are complete with this piece. A compressed one is given as an empty one.
    pub(super) fn feed(&mut self, piece: &[u8]) -> Vec<Vec<u8>> {
        self.0.extend_from_slice(piece);
        let mut found = Vec::new();
        while let Some((head, rest)) = self.0.split_first_chunk::<5>() {
            let Some(message) = rest.get(..length(*head)) else { break };
            found.push(if head[0] == 0 { message.to_vec() } else { Vec::new() });
            self.0.drain(..5 + message.len());
        }
        found
    }
}

fn length([_, length @ ..]: [u8; 5]) -> usize {
    usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX)
}

/// Finds the end of the n-th message in what arrives in pieces of any size.
#[derive(Debug)]
pub(super) struct Cut {
    messages: u64,
    head: Vec<u8>,
    body: usize,
}

impl Cut {
    pub(super) fn after(messages: u64) -> Self {
        Self { messages, head: Vec::new(), body: 0 }
    }

    pub(super) fn reached(&self) -> bool {
        self.messages == 0
    }

    /// How many bytes of this piece come before the cut.
    pub(super) fn before(&mut self, piece: &[u8]) -> usize {
        let mut at = 0;
        while !self.reached() && at < piece.len() {
            if let Some(missing) =
                5_usize.checked_sub(self.head.len()).filter(|missing| *missing > 0)
            {
                let taken = piece.iter().skip(at).take(missing);
                self.head.extend(taken);
                at = piece.len().min(at + missing);
                self.body = self.head.first_chunk().map_or(0, |head| length(*head));
            } else {
                let taken = self.body.min(piece.len() - at);
                self.body -= taken;
                at += taken;
            }
            if self.head.len() == 5 && self.body == 0 {
                self.head.clear();
                self.messages -= 1;
            }
        }
        at
    }
}

/// The fields of a message that are messages, strings or bytes: number and content. What is no
/// message ends early.
pub(super) fn fields(message: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let mut rest = message;
    std::iter::from_fn(move || {
        loop {
            let (tag, after) = varint(rest)?;
            // The lowest three bits are the kind of what follows.
            match tag & 7 {
                0 => rest = varint(after)?.1,
                1 => rest = after.get(8..)?,
                2 => {
                    let (length, after) = varint(after)?;
                    let (content, after) = after.split_at_checked(usize::try_from(length).ok()?)?;
                    rest = after;
                    return Some((tag >> 3, content));
                }
                5 => rest = after.get(4..)?,
                _ => return None,
            }
        }
    })
}

/// A number of seven bits a byte, the lowest first, and what follows it.
fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0;
    for (index, byte) in bytes.iter().enumerate().take(10) {
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Some((value, bytes.get(index + 1..)?));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three messages of 0, 3 and 300 bytes.
    fn three() -> Vec<u8> {
        let mut wire = vec![0, 0, 0, 0, 0];
        wire.extend([0, 0, 0, 0, 3, 1, 2, 3]);
        wire.extend([0, 0, 0, 1, 44]);
        wire.extend([9; 300]);
        wire
    }

    #[test]
    fn messages_are_put_together_from_any_pieces() {
        for size in [1, 2, 4, 5, 6, 7, 11, 100, 1000] {
            let mut messages = Messages::default();
            let found: Vec<_> =
                three().chunks(size).flat_map(|piece| messages.feed(piece)).collect();
            assert_eq!(found, [vec![0; 0], vec![1, 2, 3], vec![9; 300]], "in pieces of {size}");
        }
        let mut messages = Messages::default();
        assert_eq!(messages.feed(&[1, 0, 0, 0, 1, 7, 0]), [vec![0; 0]]);
        assert_eq!(messages.feed(&[0, 0, 0, 1, 8]), [vec![8]]);
    }

    #[test]
    fn a_cut_is_behind_the_message_that_it_says() {
        for size in [1, 2, 4, 5, 6, 7, 11, 100, 1000] {
            for (messages, expected) in [(0, 0), (1, 5), (2, 13), (3, 318), (4, 318)] {
                let mut cut = Cut::after(messages);
                let passed: usize = three().chunks(size).map(|piece| cut.before(piece)).sum();
                let what = format!("{messages} messages in pieces of {size}");
                assert_eq!((passed, cut.reached()), (expected, messages < 4), "{what}");
            }
        }
    }

    #[test]
    fn fields_are_found_between_those_that_do_not_count() {
        // 1: varint 300, 2: "ab", 3: fixed64, 2: "", 4: fixed32, 100: "z"
        let message = [
            &[8, 0xac, 2, 18, 2, b'a', b'b', 25][..],
            &[1; 8],
            &[18, 0, 37],
            &[1; 4],
            &[0xa2, 6, 1, b'z'],
        ];
        let message = message.concat();
        let found: Vec<_> = fields(&message).collect();
        assert_eq!(found, [(2, &b"ab"[..]), (2, b""), (100, b"z")]);
        // Cut anywhere, it ends early.
        for end in 0..message.len() {
            assert!(fields(&message[..end]).count() < 3);
        }
        assert_eq!(fields(&[0xff; 20]).count(), 0);
    }
}
