//! The benchmark's chain of devices notices what it has to notice: packets that are lost, changed, or somewhere else. Needs
//! root.

use std::os::fd::AsFd as _;

use anyhow::Result;
use lb_tests::bench::{
    forward::{
        Node,
        cast::{ACK, Flows},
        chain::End,
        empty_redirect,
        run::Exit,
        sink::{Arrived, Same},
        stream::{self, Shape},
    },
    insn::{self, Insn, Size},
    sys::{self, ProgType},
};

const FLOWS: u32 = 64;

fn shapes() -> impl Iterator<Item = Shape> {
    let all = [(false, false), (false, true), (true, false), (true, true)];
    all.into_iter().map(|(is_v6, is_tcp)| Shape { is_v6, is_tcp })
}

#[test]
fn what_arrives_as_it_was_sent_is_right() -> Result<()> {
    let node = empty_redirect(1)?;
    for shape in shapes() {
        let flows = Flows::new(shape, FLOWS, 10);
        let stream = flows.requests(&node.chain, 0, ACK);
        let exit = Exit::Outside(End::Server);
        let path = node.path(0, End::Client, &[&stream], exit, &flows.untouched())?;
        let (_, arrived) = path.send(4 * FLOWS, true)?;
        assert_eq!(arrived, Arrived { right: 4 * u64::from(FLOWS), ..Arrived::default() }, "{shape:?}");
    }
    Ok(())
}

#[test]
fn packets_that_nobody_translated_are_wrong() -> Result<()> {
    let node = empty_redirect(1)?;
    for shape in shapes() {
        let flows = Flows::new(shape, FLOWS, 10);
        let stream = flows.requests(&node.chain, 0, ACK);
        let exit = Exit::Outside(End::Server);
        let path = node.path(0, End::Client, &[&stream], exit, &flows.translated(0, None))?;
        for verify in [false, true] {
            let (_, arrived) = path.send(FLOWS, verify)?;
            assert_eq!(arrived, Arrived { wrong: FLOWS.into(), ..Arrived::default() }, "{shape:?}");
        }
        assert!(path.deliver(FLOWS, false).is_err());
    }
    Ok(())
}

#[test]
fn a_byte_that_no_checksum_knows_of_is_wrong() -> Result<()> {
    for shape in shapes() {
        // In the source address, in the layer 4 header, in the payload.
        let inside = [shape.src() + 2, shape.l4() + 4, shape.payload() + 4];
        for offset in inside {
            let node = Node::new(1, |chain| {
                let lane = chain.lanes[0];
                let mut code = insn::bounds(ProgType::Xdp, shape.frame_bytes() as i32);
                code.push(Insn::store_imm(Size::Half, 7, offset, 0x5a5a));
                code.extend(stream::redirect(lane.server.node));
                let program = sys::load(ProgType::Xdp, &code)?;
                let back = stream::redirecting(lane.client.node)?;
                Ok([
                    chain.attach(lane.client.node, program.as_fd())?,
                    chain.attach(lane.server.node, back.as_fd())?,
                ])
            })?;
            let flows = Flows::new(shape, FLOWS, 10);
            let stream = flows.requests(&node.chain, 0, ACK);
            let exit = Exit::Outside(End::Server);
            let path = node.path(0, End::Client, &[&stream], exit, &flows.untouched())?;
            let (_, arrived) = path.send(FLOWS, true)?;
            assert_eq!(arrived, Arrived { wrong: FLOWS.into(), ..Arrived::default() }, "{shape:?} {offset}");
        }
    }
    Ok(())
}

#[test]
fn what_gets_lost_is_missed() -> Result<()> {
    let shape = Shape { is_v6: false, is_tcp: false };
    let flows = Flows::new(shape, FLOWS, 10);
    // A node without anything: the frames enter its stack, or do not even get that far.
    let node = Node::new(1, |_| Ok(()))?;
    let stream = flows.requests(&node.chain, 0, ACK);
    let path = node.path(0, End::Client, &[&stream], Exit::Outside(End::Server), &flows.untouched())?;
    assert_eq!(path.send(FLOWS, true)?.1, Arrived::default());
    assert!(path.deliver(FLOWS, false).is_err());
    Ok(())
}

#[test]
fn a_flow_that_moves_is_noticed() -> Result<()> {
    let node = empty_redirect(1)?;
    for shape in shapes() {
        let (table, few, more) =
            (stream::table(FLOWS)?, Flows::new(shape, FLOWS, 10), Flows::new(shape, FLOWS, 11));
        let send = |flows: &Flows| {
            let stream = flows.requests(&node.chain, 0, ACK);
            let mut expect = flows.untouched();
            expect.record = Some((table.clone(), FLOWS));
            let path = node.path(0, End::Client, &[&stream], Exit::Outside(End::Server), &expect)?;
            path.send(FLOWS, true).map(|(_, arrived)| arrived)
        };
        let right = |right| Arrived { right, ..Arrived::default() };
        assert_eq!(send(&few)?, right(FLOWS.into()), "{shape:?}");
        assert_eq!(send(&few)?, right(FLOWS.into()), "{shape:?}");
        // With another Service, flow n goes to n % 11 instead of n % 10: the same for the first ten only.
        let arrived = send(&more)?;
        assert_eq!(
            (arrived.right, arrived.moved, arrived.wrong),
            (10, u64::from(FLOWS) - 10, 0),
            "{shape:?}"
        );
    }
    Ok(())
}

#[test]
fn a_hop_limit_that_stays_is_wrong() -> Result<()> {
    let node = empty_redirect(1)?;
    for shape in shapes() {
        let flows = Flows::new(shape, FLOWS, 10);
        let mut expect = flows.untouched();
        // What a router would have made of it.
        for same in &mut expect.same {
            if same.offset < shape.l4() {
                let hop = if shape.is_v6 { 1 } else { 1 << 8 };
                *same = Same { value: same.value - hop, ..*same };
            }
        }
        let stream = flows.requests(&node.chain, 0, ACK);
        let path = node.path(0, End::Client, &[&stream], Exit::Outside(End::Server), &expect)?;
        let (_, arrived) = path.send(FLOWS, false)?;
        assert_eq!(arrived.wrong, u64::from(FLOWS), "{shape:?}");
    }
    Ok(())
}
